"""Ways of getting arrays from one process to another on this host, by name."""

from __future__ import annotations

from feeds.rivals import (
    FlightFeeder,
    FlightTlsFeeder,
    FlightTrainer,
    GrpcFeeder,
    GrpcTrainer,
    PickleFeeder,
    PickleTrainer,
    ZmqFeeder,
    ZmqTrainer,
)
from feeds.shared_memory import MemoryFeeder, MemoryTrainer, SpinningFeeder, SpinningTrainer
from feeds.sockets import (
    OurFeeder,
    OurNearbyFeeder,
    OurNearbyTrainer,
    OurTlsFeeder,
    OurTlsTrainer,
    OurTrainer,
    RawFeeder,
    RawTrainer,
    SlicedFeeder,
    TlsFeeder,
    TlsTrainer,
)

WAYS: dict[str, tuple[type, type]] = {
    "raw TCP": (RawFeeder, RawTrainer),
    "raw TCP, by 1 MiB": (SlicedFeeder, RawTrainer),
    "trainfleet, TCP": (OurFeeder, OurTrainer),
    "ZeroMQ": (ZmqFeeder, ZmqTrainer),
    "Arrow Flight": (FlightFeeder, FlightTrainer),
    "gRPC": (GrpcFeeder, GrpcTrainer),
    "pickle, a connection each": (PickleFeeder, PickleTrainer),
    "raw TLS": (TlsFeeder, TlsTrainer),
    "trainfleet, TLS": (OurTlsFeeder, OurTlsTrainer),
    "Arrow Flight, TLS": (FlightTlsFeeder, FlightTrainer),
    "shared memory, one copy": (MemoryFeeder, MemoryTrainer),
    "shared memory, spinning": (SpinningFeeder, SpinningTrainer),
    "trainfleet, one host": (OurNearbyFeeder, OurNearbyTrainer),
}
NEEDS = {"ZeroMQ": "zmq", "Arrow Flight": "pyarrow", "gRPC": "grpc", "raw TLS": "cryptography"}
NEEDS |= {"trainfleet, TLS": "cryptography", "Arrow Flight, TLS": "pyarrow"}
