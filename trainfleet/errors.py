"""The errors of trainfleet: each is a sentence to a person, with fact, value and remedy.

    TrainfleetError            1   anything below
    ├── ConfigError            2   a recipe, a key, a flag or a value is wrong
    │   └── PlanError          3   the plan cannot work, or not on these ranks
    ├── DependencyError        4   an optional library is missing
    ├── DataError              5   a source, a sample or a worker failed
    ├── StoreError             6   the named bytes could not be read or written
    │   └── NotStored          6   there is nothing under that name
    ├── CheckpointError        7   a checkpoint is damaged, foreign or does not fit
    │   ├── DamageFound       14   `checkpoint verify` read bytes that are not those that were written
    │   └── NotSaved          15   a run came to its end, and its last checkpoint could not be saved
    ├── LaunchError            8   the processes of a run could not be started
    ├── PeerError              9   a peer is gone, late, or unlike us
    │   └── NotAdmitted       16   a peer has the wrong credential, certificate or version, or we have
    ├── RankFailed            10   a rank of a running job failed; the report names it
    │   └── FailedTwice       13   the same error came at the same step again: a further start would meet it too
    ├── OutOfMemory           11   a rank ran out of memory
    ├── ReplicasDiffer        12   replicas that must be equal are not
    ├── AnomalyStopped        17   an anomaly was seen whose policy is to stop
    └── Stalled               18   a step did not end, and the rank that hung ended itself

The number is the exit code of the command line. Where torch, the operating system or a
library raises something of its own, `ValueError`, `TypeError` and `TimeoutError` keep their meaning.
"""

from __future__ import annotations

from typing import ClassVar


class TrainfleetError(Exception):
    """The root. `hint` is the remedy, printed on a line of its own by the command line."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.hint))


def _rebuild(cls: type[TrainfleetError], message: str, hint: str | None) -> TrainfleetError:
    return cls(message, hint=hint)


class ConfigError(TrainfleetError):
    exit_code = 2


class PlanError(ConfigError):
    exit_code = 3


class DependencyError(TrainfleetError):
    exit_code = 4


class DataError(TrainfleetError):
    exit_code = 5


class StoreError(TrainfleetError):
    exit_code = 6


class NotStored(StoreError):
    """There is nothing under that name."""


class CheckpointError(TrainfleetError):
    exit_code = 7


class DamageFound(CheckpointError):
    """Checkpoints were read to the last byte, and bytes are not those that were written."""

    exit_code = 14


class NotSaved(CheckpointError):
    """A run came to its end, and its last checkpoint could not be saved: the steps since the one before are lost."""

    exit_code = 15


class LaunchError(TrainfleetError):
    exit_code = 8


class PeerError(TrainfleetError):
    exit_code = 9


class NotAdmitted(PeerError):
    """A peer has the wrong credential, certificate or version, or we have: to try again would not help."""

    exit_code = 16


class RankFailed(TrainfleetError):
    exit_code = 10


class FailedTwice(RankFailed):
    """The same error came at the same step again: a further start would meet it too."""

    exit_code = 13


class OutOfMemory(TrainfleetError):
    exit_code = 11


class ReplicasDiffer(TrainfleetError):
    exit_code = 12


class AnomalyStopped(TrainfleetError):
    """An anomaly was seen whose policy is to stop; the state before that step was saved. Nobody starts it anew."""

    exit_code = 17


class Stalled(TrainfleetError):
    """A step did not end, and the rank that hung ended itself: another start may do better."""

    exit_code = 18
