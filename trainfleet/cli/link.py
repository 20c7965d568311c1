"""`trainfleet link`: a link that is slow, far, lossy or broken on purpose, between a port here and a target."""

from __future__ import annotations

import typer


def link(
    listen: str = typer.Argument(..., help="Port of this host, or HOST:PORT.", metavar="LISTEN", show_default=False),
    target: str = typer.Argument(..., help="Where it leads.", metavar="HOST:PORT", show_default=False),
    preset: str | None = typer.Option(None, "--preset", metavar="lan|dsl|mobile|transatlantic"),
    delay: str | None = typer.Option(None, "--delay", help="One way, such as 120ms."),
    jitter: str | None = typer.Option(None, "--jitter", help="At most so much later; bytes stay in order."),
    rate: str | None = typer.Option(None, "--rate", help="Both ways, such as 10mbit."),
    rate_up: str | None = typer.Option(None, "--rate-up", help="To the target."),
    rate_down: str | None = typer.Option(None, "--rate-down", help="From the target."),
    loss: float | None = typer.Option(None, "--loss", help="Probability for a segment, such as 0.001."),
    corruption: float | None = typer.Option(None, "--corruption", help="Probability that a byte has a flipped bit."),
    cut: list[str] | None = typer.Option(None, "--cut", help="Reset all, for 5 s after 30 s: 5s@30s, or 5s@20MB."),
    close: list[str] | None = typer.Option(None, "--close", help="Like --cut, but connections end in order."),
    half_open: list[str] | None = typer.Option(None, "--half-open", help="Swallow everything in silence."),
    pause: list[str] | None = typer.Option(None, "--pause", help="Hold everything back."),
    seed: int = typer.Option(0, "--seed", help="The same bytes are late or flipped in every run of a seed."),
) -> None:
    """Emulate a link between a port of this host and a target, to Ctrl-C.

    Programs dial LISTEN instead of HOST:PORT. What is given beside a preset takes its place; faults may be given more
    than once.
    """
    import signal
    import threading

    from trainfleet import log
    from trainfleet.net.conditions import Fault, FaultKind
    from trainfleet.net.link import Link

    given: list[tuple[FaultKind, list[str] | None]] = [
        ("cut", cut),
        ("close", close),
        ("half_open", half_open),
        ("pause", pause),
    ]
    faults = [Fault.parse(kind, words) for kind, several in given for words in several or ()]
    log.setup("info")
    ended = threading.Event()
    with Link(
        target,
        listen=f"127.0.0.1:{listen}" if listen.isdigit() else listen,
        preset=preset,
        seed=seed,
        faults=faults,
        delay=delay,
        jitter=jitter,
        rate=rate,
        rate_up=rate_up,
        rate_down=rate_down,
        loss=loss,
        corruption=corruption,
    ) as opened:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        print("{}:{} leads to {}: {}.".format(*opened.address, target, opened.conditions), flush=True)
        ended.wait()
    print(f"Ended: {opened.counters}.")
