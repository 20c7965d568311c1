from __future__ import annotations

from trainfleet.monitor.system.stats import GpuStats, InterfaceStats, SystemStats, of_a_rank

RATE = InterfaceStats(received_bytes_per_second=1.0, sent_bytes_per_second=2.0)
STATS = SystemStats(
    cpu_percent=50.0,
    process_memory_bytes=3,
    network={"eth0": RATE, "lo": RATE, "veth1a2b": RATE},
    gpus=(GpuStats(index=1, name="H200", power_watts=300.0),),
)


def test_flat_has_what_is_known_by_name() -> None:
    assert STATS.flat() == {
        "cpu_percent": 50.0,
        "process_memory_bytes": 3,
        "network/eth0/received_bytes_per_second": 1.0,
        "network/eth0/sent_bytes_per_second": 2.0,
        "gpu/1/power_watts": 300.0,
    }
    assert SystemStats().flat() == {}


def test_a_rank_that_is_not_the_first_of_its_host_tells_of_its_process_and_its_gpu() -> None:
    assert of_a_rank(STATS.flat()) == {"process_memory_bytes": 3, "gpu/1/power_watts": 300.0}
